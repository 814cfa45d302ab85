# make setup: the environment; make demo: the whole pipeline on toy data; make test: every test. CPU, no downloads but pip's.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python

.PHONY: setup demo test clean

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

clean:
	rm -rf output data/toy data/cams
