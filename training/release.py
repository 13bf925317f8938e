"""From a trained checkpoint to what ships: quantized, measured, with a card that says what was measured.

    python training/release.py WORK/ models/tiny-coder

reads WORK/out (of train.py) and WORK/held_out.jsonl, writes the model and, under WORK/variants, what it is compared
with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from evaluate import beginnings, bits_per_byte, misread, report_fim
from safetensors import safe_open

from mixbit.engine.convert.requantize import ConvertOptions, convert_checkpoint
from mixbit.engine.convert.widths import Width, parse_override
from mixbit.engine.demo import ensure_demo
from mixbit.engine.routing import ExpertLoad, expert_load

SHIPPED = "4-bit, 8-bit gates"
GATES = ("*.mlp.gate", "*.mlp.shared_expert_gate")
OVERRIDES = {  # of 4 bits with 8-bit gates
    SHIPPED: (),
    "4-bit, 4-bit gates": tuple(f"{gate}=4" for gate in GATES),
    "4-bit, 8-bit gates, 2-bit experts": ("*.mlp.switch_mlp.*=2",),
}
MOST_BYTES = 32_000_000


def _silent(stage: str, done: int, total: int) -> None:
    pass


def quantize(source: Path, out: Path, overrides: tuple[str, ...]) -> Path:
    """The checkpoint at 4 bits, groups of 64, with 8-bit gates unless the overrides say otherwise."""
    options = ConvertOptions(width=Width(4, 64), overrides=tuple(map(parse_override, overrides)))
    convert_checkpoint(source, out, options, progress=_silent, force=True)
    return out


def bits_table(work: Path, variants: dict[str, Path], characters: int) -> str:
    """Bits per byte of every variant, of the misread one, and of SmolLM2."""
    texts = beginnings(work / "held_out.jsonl", characters)
    shipped = variants[SHIPPED]
    rows = [("bfloat16", work / "out", None), *((name, path, None) for name, path in variants.items())]
    rows += [(f"{SHIPPED} misread as 4-bit", shipped, misread(shipped))]
    rows += [("SmolLM2-135M-Instruct, 4-bit, 8-bit embedding", ensure_demo(_silent), None)]
    lines = ["| weights | bits per byte |", "|---|---|"]
    for name, path, program in rows:
        lines.append(f"| {name} | {bits_per_byte(path, texts, program, name):.3f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def plot_loss(csv: Path, out: Path) -> None:
    """The curve of the loss, and its mean over 25 entries."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    steps, loss, _ = np.loadtxt(csv, delimiter=",", skiprows=1, unpack=True, ndmin=2)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, loss, color="#9ecae1", linewidth=0.8)
    width = min(25, len(loss))
    axes.plot(steps[width - 1 :], np.convolve(loss, np.ones(width) / width, "valid"), color="#08519c")
    top = float(np.quantile(loss, 0.98))
    axes.set(xlabel="step", ylabel="loss, nats per token", title="tiny-coder", ylim=(None, top))
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def facts(work: Path, shipped: Path, load: ExpertLoad) -> dict[str, Any]:
    """What the card says of the model and of its training."""
    config, run = (json.loads((work / "out" / name).read_text()) for name in ("config.json", "run.json"))
    with safe_open(work / "out" / "model.safetensors", "np") as tensors:
        sizes = {name: int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
    experts = sum(size for name, size in sizes.items() if "switch_mlp" in name)
    idle = experts * (1 - config["num_experts_per_tok"] / config["num_experts"])
    total, step = sum(sizes.values()), run["batch"] * config["max_position_embeddings"]
    return {
        "parameters": f"{total / 1e6:.1f} M",
        "active": f"{(total - idle) / 1e6:.1f} M",
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "experts": config["num_experts"],
        "chosen": config["num_experts_per_tok"],
        "vocabulary": f"{config['vocab_size']:,}",
        "context": f"{config['max_position_embeddings']:,}",
        "size": f"{sum(file.stat().st_size for file in shipped.iterdir()) / 1e6:.1f} MB",
        "steps": f"{run['steps']:,}",
        "step_tokens": f"{step:,}",
        "tokens": f"{run['steps'] * step / 1e6:.0f} M",
        "minutes": f"{run['seconds'] / 60:.1f}",
        "device": run["device"],
        "least": f"{load.shares.min():.2f}",
        "most": f"{load.shares.max():.2f}",
        "dead": f"{len(load.dead)} experts are dead" if load.dead else "none is dead",
    }


def release(work: Path, out: Path, characters: int, count: int) -> None:
    """Quantize, measure, and put together what ships in the directory `out`."""
    variants = {
        name: quantize(work / "out", work / "variants" / name.replace(", ", "-").replace(" ", "-"), overrides)
        for name, overrides in OVERRIDES.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        # Under the name that it is served by: its preset goes by it.
        shipped = Path(folder) / "tiny-coder"
        shutil.copytree(variants[SHIPPED], shipped)
        load = expert_load(shipped, "".join(beginnings(work / "held_out.jsonl", 20_000)), 4096)
        fim = report_fim(shipped, work / "held_out.jsonl", count)
        print(fim, flush=True)
        bits = bits_table(work, variants, characters)
        plot_loss(work / "out" / "loss.csv", shipped / "loss.png")
        card = Template((Path(__file__).with_name("card.md")).read_text())
        told = {**facts(work, shipped, load), "bits": bits, "fim": fim, "characters": f"{characters:,}"}
        (shipped / "README.md").write_text(card.substitute(told))
        size = sum(file.stat().st_size for file in shipped.iterdir())
        if size > MOST_BYTES:
            raise SystemExit(f"{size / 1e6:.1f} MB are more than the {MOST_BYTES / 1e6:.0f} MB that may ship")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(shipped, out)
    print(f"{out}: {size / 1e6:.1f} MB, {load.dead or 'no'} dead experts")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=300_000, help="of held-out code, for bits per byte")
    parser.add_argument("--count", type=int, default=200, help="lines to fill in")
    args = parser.parse_args()
    release(args.work, args.out, args.characters, args.count)


if __name__ == "__main__":
    main()
