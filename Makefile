# make serve, make test: everything a fresh machine needs comes from package registries.
# (grows below)
native: ## rebuild the native module in place (development)
	.venv/bin/cmake --build build/cp3*
	.venv/bin/cmake --install build/cp3* --prefix "$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
