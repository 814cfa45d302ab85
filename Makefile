# make setup: the environment; make demo: the whole pipeline on toy data; make test: ruff and every test; make bench: the tests that
# need a GPU, where there is one, and the speed measurements, which become docs/performance.md. CPU, no downloads but pip's.
# pydensecrf2 is compiled; where it cannot be, everything works without it.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test bench clean

setup: $(VENV)/installed

# The stamp is written last, so that an interrupted installation is taken up again.
$(VENV)/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt || { grep -v pydensecrf2 requirements.txt > $(VENV)/without_crf.txt && \
		$(PIP) -r $(VENV)/without_crf.txt && \
		echo "WARNING: pydensecrf2 cannot be built here; the dense CRF will run in torch (--crf_backend torch)" >&2; }
	touch $@

demo: setup
	$(RUN) -m benchmarks.demo

test: setup
	$(RUN) -m ruff check --no-cache
	$(RUN) -m pytest

bench: setup
	$(RUN) -m pytest -m gpu -rs
	$(RUN) -m benchmarks.performance

clean:
	rm -rf output data/toy data/cams
