"""What settings are called elsewhere, for whoever types those names: looked up before the nearest name is guessed.

train-llm-from-scratch (the README's table), nanoGPT, Hugging Face's Trainer, and what many scripts have in common.
"""

# Its name here; of several the one that the program has.
NAMES = {
    # train-llm-from-scratch
    "amp": "dtype", "amp_dtype": "dtype", "checkpoint_dir": "run_dir model_path", "checkpoint_every": "save_interval",
    "context_length": "block_size", "grad_checkpointing": "activation_checkpointing", "keep_last": "keep_checkpoints",
    "n_blocks": "n_layer", "n_embed": "n_embd", "t_context_length": "block_size", "t_eval_iters": "eval_tokens",
    "t_eval_steps": "eval_interval", "t_lr": "lr", "t_lr_decay_step": "lr_decay_step", "t_lr_decayed": "min_lr",
    "t_train_steps": "max_steps",
    # nanoGPT
    "dataset": "train_file", "decay_lr": "schedule", "eval_iters": "eval_tokens", "learning_rate": "lr",
    "lr_decay_iters": "max_steps", "max_iters": "max_steps", "out_dir": "run_dir model_path", "start": "input_text",
    "wandb_log": "tensorboard", "warmup_iters": "warmup_steps",
    # Hugging Face
    "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "adam_eps", "bf16": "dtype",
    "deepspeed": "deepspeed_config", "eval_steps": "eval_interval", "fp16": "dtype",
    "gradient_checkpointing": "activation_checkpointing", "hidden_size": "n_embd", "logging_steps": "log_interval",
    "lr_scheduler_type": "schedule", "max_grad_norm": "grad_clip", "max_length": "max_new_tokens block_size",
    "max_position_embeddings": "block_size", "max_seq_length": "block_size",
    "model_name_or_path": "model_path init_from", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
    "num_return_sequences": "num_samples", "output_dir": "run_dir model_path", "report_to": "tensorboard",
    "resume_from_checkpoint": "resume", "save_steps": "save_interval", "save_total_limit": "keep_checkpoints",
    "tokenizer": "tokenizer_name", "torch_compile": "compile", "warmup_ratio": "warmup_steps",
    # many
    "checkpoint": "model_path resume", "ckpt": "model_path resume", "d_model": "n_embd", "data_dir": "train_file",
    "max_tokens": "max_new_tokens", "mixed_precision": "dtype", "model": "model_path preset", "num_heads": "n_head",
    "num_layers": "n_layer", "precision": "dtype", "prompt": "input_text sample_prompt", "seq_len": "block_size",
}  # fmt: skip

_BATCH = "a step is --batch_tokens, in tokens; --micro_batch_size, in sequences, is chosen unless you set it"
_ACCUMULATION = "it follows from --batch_tokens and --micro_batch_size"
_EPOCHS = "a run lasts --max_steps, each of --batch_tokens"
# Why there is no such setting. Said by a program that has every flag that is in the sentence.
REASONS = {
    "batch_size": _BATCH, "per_device_train_batch_size": _BATCH, "t_batch_size": _BATCH,
    "accumulation_steps": _ACCUMULATION, "grad_accum": _ACCUMULATION, "grad_accum_steps": _ACCUMULATION,
    "gradient_accumulation_steps": _ACCUMULATION,
    "epochs": _EPOCHS, "num_epochs": _EPOCHS, "num_train_epochs": _EPOCHS,
    "dropout": "there is none: one epoch over the Pile needs none",
    "optim": "there is AdamW; --weights and --moments are the formats of its states",
    "report_memory": "tools/plan.py shows it, before anything is started",
}  # fmt: skip
