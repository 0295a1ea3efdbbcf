"""One file per architecture, named by the `model_type` of its Hugging Face config.json.

Each has `Config` (the fields of config.json it needs), `Model` (the backbone), `HEADS` (a name of
`architectures` -> what stands on Model, None for Model alone; the first is meant where none is named) and
`KEYS`, the KeyMap of its checkpoints.
"""
