"""One file per architecture, named by the `model_type` of its Hugging Face config.json.

Each has `Config` (the fields of config.json it needs), `Model`, `rename(key)` (a checkpoint's tensor name
as the model's, or None for a tensor the model does not use) and `original(name)` (the other way round).
"""
