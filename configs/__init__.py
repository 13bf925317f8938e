"""Settings that ship with Mixbit: engine limits and model presets, as TOML."""
