# Two commands for everybody: `make demo` (the study, on this machine) and `make test` (what CI runs).
# Each sets itself up: a virtual environment in .venv with the package and its development tools.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg

.PHONY: help demo test lab docs measure study photos clean install
.DEFAULT_GOAL := help

help:
	@echo "make demo   run the five methods on MTIL-mini and write runs/demo/report.html"
	@echo "make test   run every notebook (nbdev_test) and every test (pytest), the manners of the code among them"
	@echo "make lab    open the notebooks in JupyterLab"
	@echo "make study   run the study again: does merging help? (about 220 runs of 2 minutes on one core each; finished runs are kept)"
	@echo "make measure run every other measurement again (an estimate: 90 minutes on two cores; finished runs are kept)"
	@echo "make photos the question on photographs: PHOTOS=folder stream PRETRAIN=folder of other photographs WEIGHTS=file.safetensors (an estimate: 5 hours on one core)"
	@echo "make docs   README.md and the site of all pages in _docs/"
	@echo "make clean  remove what these commands made (not your runs)"

install: .venv/installed

.venv/installed: setup.py settings.ini pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: install
	$(BIN)/moe-merge -m experiment=demo
	$(BIN)/moe-merge-report runs/demo

# `nbdev_test` for all pages, each in a process of its own that has the package imported.
PAGES := $(BIN)/python tools/test_pages.py --n_workers 2 --timing
# Each file of tests is run by one worker, which makes its fixtures once (groups by mark have no effect with pytest 9.2 and pytest-xdist 3.8).
test: install
	$(PAGES)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: install
	$(BIN)/jupyter lab nbs

study: install
	for e in `$(BIN)/python -c 'from moe_merge_nb.study.measured import STUDY; print(*sum(STUDY.values(), []))'`; do $(BIN)/moe-merge -m experiment=$$e || exit 1; done
	$(BIN)/python tools/pack_runs.py
	$(BIN)/python tools/principle_runs.py

measure: install
	$(BIN)/moe-merge -m experiment=study
	$(BIN)/moe-merge -m experiment=baselines
	$(BIN)/moe-merge -m experiment=demo
	$(BIN)/moe-merge -m experiment=shared
	$(BIN)/moe-merge -m experiment=combine
	$(BIN)/moe-merge -m experiment=combine_aligned
	$(BIN)/python tools/reduce_runs.py shared runs/shared/*
	$(BIN)/python tools/pack_runs.py

# Both folders hold small photographs (moe-merge-data shrink makes such). The rates are chosen on held out training images.
PHOTOS ?= photos32
PRETRAIN ?= pretrain32
WEIGHTS ?= pico_photo.safetensors
photos: install
	test -d $(PHOTOS)_held || $(BIN)/python tools/hold_out.py $(PHOTOS) $(PHOTOS)_held
	test -f $(WEIGHTS) || $(BIN)/python tools/pretrain_photo.py $(PRETRAIN) $(WEIGHTS) --resume
	for e in photos_rates photos_rates_full; do $(BIN)/moe-merge -m experiment=$$e root=$(PHOTOS)_held model.pretrained=$(WEIGHTS) || exit 1; done
	for e in photos photos_bounds; do $(BIN)/moe-merge -m experiment=$$e root=$(PHOTOS) model.pretrained=$(WEIGHTS) || exit 1; done

docs: install
	$(BIN)/python tools/build_docs.py --site

clean:
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache
