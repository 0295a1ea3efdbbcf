"""Tiny random models with a tokenizer, as the shipped ones have them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import warpformer as wf
from warpformer.models import llama, transformer

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
TEXTS = ["In the beginning", "God created the heaven", "and the earth.", "żółć, ¿qué?"]


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def save_translator(folder):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = transformer.Config(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_start_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformer.ConditionalGeneration(transformer.Model(config), config)
    with torch.no_grad():
        model.backbone.tokens.weight.mul_(3)
    return save(model, tokenizer, folder)


def save_language_model(folder, tokenizer=None):
    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    config = llama.Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = llama.CausalLM(llama.Model(config), config)
    model.config.source = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | {key: getattr(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    model.config.source |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    return save(model, tokenizer, folder)


def save(model, tokenizer, folder):
    wf.save(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
