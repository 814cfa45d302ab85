# make setup: the environment; make demo: the whole pipeline on toy data; make test: every test; make bench: the tests that
# need a GPU, where there is one, and the speed measurements. CPU, no downloads but pip's.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python

.PHONY: setup demo test bench clean

setup: $(VENV)/installed

# The stamp is written last, so that an interrupted installation is taken up again.
$(VENV)/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(RUN) -m benchmarks.demo

test: setup
	$(RUN) -m pytest

bench: setup
	$(RUN) -m pytest -m gpu -rs
	$(RUN) -m benchmarks.deeplab
	$(RUN) -m benchmarks.scoring
	$(RUN) -m benchmarks.random_walk
	$(RUN) -m benchmarks.affinity_loss
	$(RUN) -m benchmarks.loader
	$(RUN) -m benchmarks.train_throughput

clean:
	rm -rf output data/toy data/cams
