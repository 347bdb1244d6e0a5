# Everything below works from a clean clone: the virtual environment is made and filled first, with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SUITE := $(VENV)/.transformers-tests
QWEN := $(VENV)/qwen.tiktoken
OLDEST := .venv-oldest
NEWEST := .venv-newest
# Tests run in two processes of one thread each; whichever is done takes over half of what the other has left.
IN_PARALLEL := -n 2 --dist worksteal

.PHONY: demo check test test-fast test-oldest test-newest lint bench train-demo train-english train-shipped clean

# Transcribe the recordings that the repository ships, and yours: make demo FILES="one.wav two.flac"
demo: $(INSTALLED)
	$(BIN)/seam demo $(FILES)

test: lint $(SUITE) $(QWEN)
	$(BIN)/pytest $(IN_PARALLEL)

# Leaves out what takes minutes.
test-fast: lint $(SUITE) $(QWEN)
	$(BIN)/pytest $(IN_PARALLEL) -m "not slow"

# For whoever is in the middle of a change: leaves out trainings and processes, too.
check: lint $(SUITE) $(QWEN)
	$(BIN)/pytest $(IN_PARALLEL) -m "not slow and not medium"

# The contract with transformers (tests marked oldest) with the oldest that setup.cfg allows.
test-oldest: $(OLDEST)/.installed $(QWEN)
	$(OLDEST)/bin/python -m pytest $(IN_PARALLEL) -m "oldest and not slow"

# The same with the newest of everything that setup.cfg allows.
test-newest: $(NEWEST)/.installed $(QWEN)
	$(NEWEST)/bin/python -m pytest $(IN_PARALLEL) -m "oldest and not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/seam
	$(BIN)/mypy

# SEAM's loops and trainings against stock transformers on this machine, then every step of the architecture once. The loops at
# SIZE=paper take 16 GB of memory and half an hour, all steps 24 GB; the trainings at TRAINING_SIZE=base 6 GB and half an hour.
SIZE ?= tiny
TRAINING_SIZE ?= tiny
FULL_SIZE = $(if $(filter paper,$(SIZE)),paper,tiny)
bench: $(INSTALLED)
	mkdir -p runs
	$(BIN)/python -m bench.inference --size $(SIZE) --json runs/inference-$(SIZE).json --plot runs/inference-$(SIZE).png
	$(BIN)/python -m bench.training --size $(TRAINING_SIZE) --json runs/training-$(TRAINING_SIZE).json --plot runs/training-$(TRAINING_SIZE).png
	$(BIN)/python -m bench.full_size --size $(FULL_SIZE) --json runs/full-size-$(FULL_SIZE).json

# From nothing to a checkpoint: synthetic speech, tiny backbones, the three stages, a table.
train-demo: $(INSTALLED)
	$(BIN)/seam train demo recipes/demo/tiny.yaml

# The English checkpoint, on folders of people's speech with the splits train and dev: on two cores in less than three hours.
# An interrupted training goes on where it stopped. On a GPU the same command uses it.
train-english: $(INSTALLED)
	$(BIN)/seam train english recipes/english/english.yaml
	rm -rf checkpoints/english && cp -r runs/english/model checkpoints/english
	for code in modeling_seam configuration_seam.py processing_seam.py audio_files.py; do \
		rm -r checkpoints/english/$$code && ln -s ../../$$code checkpoints/english/$$code || exit 1; done

# The tiny checkpoint of the tests: the same with recordings of people, a folder with a metadata.jsonl (an audiofolder).
PEOPLE ?= ../shared/speech
train-shipped: $(INSTALLED)
	$(BIN)/seam train demo recipes/demo/shipped.yaml speech.people=$(PEOPLE) second_round.speech.people=$(PEOPLE)
	rm -rf checkpoints/tiny checkpoints/recordings
	cp -r runs/shipped/model checkpoints/tiny
	for code in modeling_seam configuration_seam.py processing_seam.py audio_files.py; do \
		rm -r checkpoints/tiny/$$code && ln -s ../../$$code checkpoints/tiny/$$code || exit 1; done
	cp -r runs/shipped/tests/recordings checkpoints/recordings

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test]'
	touch $@

# transformers' own model tests are in its source distribution only: the pinned version's, to VENV/transformers-VERSION.
$(SUITE): $(INSTALLED)
	rm -rf $(VENV)/transformers-*
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
		--constraint constraints.txt --dest $(VENV) transformers
	cd $(VENV) && tar -tzf transformers-*.tar.gz | grep '^[^/]*/tests/[^/]*\.py$$' | xargs tar -xzf transformers-*.tar.gz
	rm $(VENV)/transformers-*.tar.gz
	touch $@

# Qwen's vocabulary lies in the wheel of dashscope, whose many dependencies nothing here needs.
$(QWEN): $(INSTALLED)
	rm -f $(VENV)/dashscope-*.whl
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--constraint constraints.txt --dest $(VENV) dashscope
	cd $(VENV) && bin/python -m zipfile --extract dashscope-*.whl dashscope-wheel
	mv $(VENV)/dashscope-wheel/dashscope/resources/qwen.tiktoken $@
	rm -r $(VENV)/dashscope-*

# Only what is older is installed here; everything else is found in $(VENV), which comes later on the path.
$(OLDEST)/.installed: $(INSTALLED) constraints-oldest.txt
	$(BIN)/python -m venv --clear --without-pip $(OLDEST)
	$(BIN)/pip --python $(OLDEST)/bin/python install --quiet --disable-pip-version-check --no-deps \
		--requirement constraints-oldest.txt
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth
	$(OLDEST)/bin/python -m pip check
	touch $@

# As `pip install` has it today: no constraints, so that what a new release breaks is seen here first. Only torch stays
# at the version of constraints.txt: another may come as gigabytes of CUDA.
$(NEWEST)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --no-compile \
		"$$(grep ^torch== constraints.txt)" --editable '.[demo,test]'
	$(NEWEST)/bin/pip check
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) runs *.egg-info
