"""Translation of texts by an encoder-decoder model."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from warpformer._C import InputError
from warpformer.checkpoint import find_checkpoint, open_tokenizer
from warpformer.generation import generate
from warpformer.generation.checks import as_tuple
from warpformer.generation.defaults import of_model
from warpformer.load import load
from warpformer.models._config import CheckpointError


class Translator:
    """An encoder-decoder model and its tokenizer.json.

    Args:
        path_or_hub_id: their folder, or the id of a repository of the Hugging Face hub.
        dtype: of parameters and activations; that of the checkpoint if None.
        device: the CPU if None.
        quantization: as in `warpformer.load`.

    Attributes:
        model: as `warpformer.load` returns it.
        tokenizer: of the tokenizers library.
        max_length: tokens of a text or of its translation, at most; None without a limit.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        CheckpointError: a file is damaged, or the model is no encoder-decoder model that ends what it writes.
    """

    def __init__(self, path_or_hub_id, *, dtype: torch.dtype | None = None, device=None, quantization=None):
        folder = find_checkpoint(path_or_hub_id)
        self.tokenizer = open_tokenizer(folder)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # "</s>" in a text is these letters
        self.model = load(folder, dtype=dtype, device=device, quantization=quantization)
        if not (hasattr(self.model, "encode") and hasattr(self.model, "generate")):
            raise CheckpointError(f"{folder}: {type(self.model).__name__} is not for conditional generation")
        self._ends = as_tuple(of_model(self.model, "eos_token_id"))
        if not self._ends:
            raise CheckpointError(f"{folder}/config.json has no eos_token_id")
        self.max_length = getattr(self.model.config, "max_position_embeddings", None)

    def translate(
        self,
        texts: str | Sequence[str],
        *,
        num_beams: int = 4,
        batch_size: int = 32,
        max_new_tokens: int = 256,
        progress: Callable[[int], object] | None = None,
        **options,
    ) -> str | list[str] | list[list[str]]:
        """Translations.

        Args:
            texts: one or several. What is blank stays empty.
            num_beams: of the search; 1 is greedy.
            batch_size: most texts of a step. They are sorted by length, and the result does not depend on it.
            max_new_tokens: of each; at most `max_length`.
            progress: called with a number of texts when so many are translated.
            options: those of `GenerationConfig`.

        Returns:
            A text, or a list of as many as given; with num_return_sequences in the place of each text a list
            of so many, the best first.

        Raises:
            InputError: an option is out of its range, or a text has more than max_length tokens.
            TypeError: an input is not a text.
        """
        if isinstance(texts, str):
            return self.translate([texts], num_beams=num_beams, max_new_tokens=max_new_tokens, **options)[0]
        if batch_size < 1:
            raise InputError(f"translate: batch_size = {batch_size} is not at least 1")
        if options.pop("return_dict_in_generate", False):
            raise InputError("translate: return_dict_in_generate is for generate, which gives tokens")
        count = options.get("num_return_sequences")
        if self.max_length is not None:
            max_new_tokens = min(max_new_tokens, self.max_length)
        tokens = self._tokenize(texts)
        translations = ["" if count is None else [""] * count for _ in tokens]
        order = sorted((i for i, ids in enumerate(tokens) if ids), key=lambda i: -len(tokens[i]))
        if progress is not None and len(order) < len(tokens):
            progress(len(tokens) - len(order))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = self._batch([tokens[i] for i in chosen])
            given = dict(num_beams=num_beams, max_new_tokens=max_new_tokens, tokenizer=self.tokenizer)
            found = generate(self.model, ids, mask, **given, **options)
            decoded = self.tokenizer.decode_batch(found.tolist(), skip_special_tokens=True)
            decoded = [text.strip() for text in decoded]
            for n, i in enumerate(chosen):
                translations[i] = decoded[n] if count is None else decoded[n * count : (n + 1) * count]
            if progress is not None:
                progress(len(chosen))
        return translations

    def _tokenize(self, texts) -> list[list[int]]:
        """Of each text its tokens and eos_token_id; of a blank one none."""
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"texts must be strings, one is {type(text).__name__}")
        rows = []
        for text, encoding in zip(texts, self.tokenizer.encode_batch_fast(list(texts)), strict=True):
            ids = encoding.ids if text.strip() else []
            if ids and ids[-1] not in self._ends:
                ids = [*ids, self._ends[0]]
            if self.max_length is not None and len(ids) > self.max_length:
                counts = f"{len(ids)} tokens, and the model reads {self.max_length}"
                raise InputError(f"translate: {text[:40]!r}... has {counts}")
            rows.append(ids)
        return rows

    def _batch(self, tokens):
        device = next(self.model.parameters()).device
        ids = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)
        lengths = torch.tensor([len(row) for row in tokens])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(device), mask.to(device)
