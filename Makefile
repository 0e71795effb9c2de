# make demo: the whole chain on the built-in world, about six minutes on two CPU cores
# make test, make test-all: the tests; make assets: the shipped halves anew, about 50 minutes
# make bench: the speed table, about ten minutes; make speedrun: seconds to 90 % of scenes_vqa
# make claims: the science table, about 30 minutes, ONLY=prefix of its cells (duo. mix. pool.), SEEDS=0,1
PYTHON ?= python3
SEED ?= 0
SEEDS ?= 0
ONLY ?= cos.
RECORD ?= tools/records/02-small-rows
BIN := .venv/bin

.PHONY: demo bench speedrun claims test test-all lint assets clean

.venv/demo.ok: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test.ok: requirements-test.txt requirements-vocab.txt requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vocab.txt
	touch $@ .venv/demo.ok

demo: .venv/demo.ok
	rm -rf runs/demo
	$(BIN)/python train_pretrain.py --preset tiny --data scenes --seed $(SEED) --out runs/demo/pretrain --later 4
	$(BIN)/python train_sft.py --init runs/demo/pretrain --scale 32to144 --data scenes --seed $(SEED) --out runs/demo/sft --later 0.3
	$(BIN)/python eval.py --model runs/demo/sft --tasks scenes --tokens both --seed $(SEED) --out runs/demo/eval.json
	test ! -d tools || $(BIN)/python tools/report.py runs/demo/eval.json --inflation true

bench: .venv/demo.ok
	$(BIN)/python tools/bench.py

speedrun: .venv/demo.ok
	$(BIN)/python tools/speedrun.py --record $(RECORD)

test: .venv/test.ok lint
	$(BIN)/python -m pytest -q -m "not slow"

test-all: .venv/test.ok lint
	$(BIN)/python -m pytest -q

lint: .venv/test.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

claims: .venv/demo.ok
	$(BIN)/python tools/claims.py --only $(ONLY) --seeds $(SEEDS)

assets: .venv/demo.ok
	$(BIN)/python tools/make_assets.py tokenizer
	$(BIN)/python tools/make_assets.py vit
	$(BIN)/python tools/make_assets.py lm --minutes 18

clean:
	rm -rf .venv runs
