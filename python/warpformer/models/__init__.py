"""One file per architecture, named by the `model_type` of its Hugging Face config.json.

Each has `Config` (the fields of config.json it needs), `Model` and `rename(key)` (a checkpoint's tensor name
as the model's, or None for a tensor the model does not use).
"""
