"""Configs that are unusual: of the model, its image processor and its tokenizer."""

import json
from typing import Any

import tiny

from .checkpoint import Checkpoint
from .oddity import oddity

IMAGE = ("ViT", "DeiT")
TEXT = ("Bert",)
CLASSIFIERS = ("Classification",)


def _sized(checkpoint: Checkpoint, height: int, width: int) -> None:
    checkpoint.entries["image_size"] = [height, width]
    checkpoint.processor["size"] = {"height": height, "width": width}


def _classes(checkpoint: Checkpoint, names: list[str]) -> None:
    checkpoint.entries["id2label"] = dict(enumerate(names))
    checkpoint.entries["label2id"] = {name: index for index, name in enumerate(names)}


@oddity(Checkpoint, slot="channels", only=IMAGE)
def one_channel(checkpoint: Checkpoint) -> None:
    checkpoint.entries["num_channels"] = 1


@oddity(Checkpoint, slot="channels", only=IMAGE)
def one_channel_of_its_processor(checkpoint: Checkpoint) -> None:
    checkpoint.entries["num_channels"] = 1
    checkpoint.processor |= {"image_mean": [0.5], "image_std": [0.5]}


@oddity(Checkpoint, slot="channels", only=IMAGE)
def four_channels(checkpoint: Checkpoint) -> None:
    checkpoint.entries["num_channels"] = 4


@oddity(Checkpoint, slot="patches", only=IMAGE, outcome="works")
def patch_size_list(checkpoint: Checkpoint) -> None:
    checkpoint.entries["patch_size"] = [8, 8]


@oddity(Checkpoint, slot="patches", only=IMAGE)
def oblong_patches(checkpoint: Checkpoint) -> None:
    checkpoint.entries["patch_size"] = [8, 16]


@oddity(Checkpoint, slot="patches", only=IMAGE)
def one_patch(checkpoint: Checkpoint) -> None:
    checkpoint.entries["patch_size"] = 32


@oddity(Checkpoint, slot="patches", only=IMAGE)
def patches_that_leave_a_rest(checkpoint: Checkpoint) -> None:
    checkpoint.entries["patch_size"] = 7


@oddity(Checkpoint, slot="size", only=IMAGE, outcome="works")
def image_size_list(checkpoint: Checkpoint) -> None:
    checkpoint.entries["image_size"] = [32, 32]


@oddity(Checkpoint, slot="size", only=IMAGE, outcome="works")
def oblong_images(checkpoint: Checkpoint) -> None:
    _sized(checkpoint, 32, 64)


@oddity(Checkpoint, slot="size", only=IMAGE)
def processor_of_another_size(checkpoint: Checkpoint) -> None:
    checkpoint.processor["size"] = {"height": 48, "width": 48}


@oddity(Checkpoint, slot="size", only=IMAGE)
def shortest_edge_without_crop(checkpoint: Checkpoint) -> None:
    checkpoint.processor["size"] = {"shortest_edge": 32}


@oddity(Checkpoint, slot="size", only=IMAGE, outcome="works")
def shortest_edge_and_crop(checkpoint: Checkpoint) -> None:
    checkpoint.processor |= {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"shortest_edge": 40},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
    }


@oddity(Checkpoint, slot="size", only=IMAGE)
def size_as_a_number(checkpoint: Checkpoint) -> None:
    checkpoint.processor["size"] = 32


@oddity(Checkpoint, slot="size", only=IMAGE)
def no_resizing(checkpoint: Checkpoint) -> None:
    checkpoint.processor["do_resize"] = False


@oddity(Checkpoint, only=IMAGE, outcome="works")
def no_normalization(checkpoint: Checkpoint) -> None:
    checkpoint.processor["do_normalize"] = False


@oddity(Checkpoint, only=IMAGE)
def spread_of_zero(checkpoint: Checkpoint) -> None:
    checkpoint.processor["image_std"] = [0.0, 0.0, 0.0]


@oddity(Checkpoint, only=IMAGE)
def feature_extractor(checkpoint: Checkpoint) -> None:
    checkpoint.processor |= {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"}


@oddity(Checkpoint, only=IMAGE)
def processor_without_a_type(checkpoint: Checkpoint) -> None:
    checkpoint.processor["image_processor_type"] = None


@oddity(Checkpoint, only=IMAGE)
def fast_processor(checkpoint: Checkpoint) -> None:
    checkpoint.processor["image_processor_type"] = "ViTImageProcessorFast"


@oddity(Checkpoint, slot="reader")
def no_processor_or_tokenizer(checkpoint: Checkpoint) -> None:
    def remove(directory: Any) -> None:
        for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            (directory / name).unlink(missing_ok=True)

    checkpoint.files.append(remove)


@oddity(Checkpoint, slot="reader", only=TEXT, outcome="works")
def vocabulary_alone(checkpoint: Checkpoint) -> None:
    def remove(directory: Any) -> None:
        (directory / "tokenizer.json").unlink()

    checkpoint.files.append(remove)


@oddity(Checkpoint, slot="reader", only=TEXT)
def tokenizer_of_more_tokens(checkpoint: Checkpoint) -> None:
    checkpoint.entries["vocab_size"] = len(tiny.VOCABULARY) - 20


@oddity(Checkpoint, slot="reader", only=TEXT, outcome="works")
def tokenizer_of_fewer_tokens(checkpoint: Checkpoint) -> None:
    checkpoint.entries["vocab_size"] = len(tiny.VOCABULARY) + 11


@oddity(Checkpoint, only=TEXT)
def tokenizer_without_padding(checkpoint: Checkpoint) -> None:
    def change(directory: Any) -> None:
        file = directory / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))

    checkpoint.files.append(change)


@oddity(Checkpoint, only=TEXT, outcome="works")
def few_positions(checkpoint: Checkpoint) -> None:
    checkpoint.entries["max_position_embeddings"] = 16


@oddity(Checkpoint, only=TEXT)
def one_token_type(checkpoint: Checkpoint) -> None:
    checkpoint.entries["type_vocab_size"] = 1


@oddity(Checkpoint, only=IMAGE, outcome="works")
def no_bias_of_queries(checkpoint: Checkpoint) -> None:
    checkpoint.entries["qkv_bias"] = False


@oddity(Checkpoint, outcome="works")
def dropout(checkpoint: Checkpoint) -> None:
    checkpoint.entries |= {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


@oddity(Checkpoint, outcome="works")
def dropout_of_one(checkpoint: Checkpoint) -> None:
    checkpoint.entries["hidden_dropout_prob"] = 1.0


@oddity(Checkpoint, slot="blocks", outcome="works")
def one_block(checkpoint: Checkpoint) -> None:
    checkpoint.entries["num_hidden_layers"] = 1


@oddity(Checkpoint, slot="blocks")
def no_block(checkpoint: Checkpoint) -> None:
    checkpoint.entries["num_hidden_layers"] = 0


@oddity(Checkpoint, slot="heads", outcome="works")
def one_head(checkpoint: Checkpoint) -> None:
    checkpoint.entries["num_attention_heads"] = 1


@oddity(Checkpoint, slot="heads", outcome="works")
def a_head_for_every_number(checkpoint: Checkpoint) -> None:
    checkpoint.entries["num_attention_heads"] = 32


@oddity(Checkpoint, slot="heads", outcome="works")
def odd_width(checkpoint: Checkpoint) -> None:
    checkpoint.entries |= {"hidden_size": 33, "num_attention_heads": 3, "intermediate_size": 35}


@oddity(Checkpoint, outcome="works")
def narrow_mlp(checkpoint: Checkpoint) -> None:
    checkpoint.entries["intermediate_size"] = 1


@oddity(Checkpoint, outcome="works")
def another_activation(checkpoint: Checkpoint) -> None:
    checkpoint.entries["hidden_act"] = "relu"


@oddity(Checkpoint)
def activation_unknown(checkpoint: Checkpoint) -> None:
    checkpoint.said["hidden_act"] = "swoosh"


@oddity(Checkpoint)
def large_epsilon(checkpoint: Checkpoint) -> None:
    checkpoint.entries["layer_norm_eps"] = 1.0


@oddity(Checkpoint, slot="classes", only=CLASSIFIERS)
def one_class(checkpoint: Checkpoint) -> None:
    _classes(checkpoint, ["thing"])


@oddity(Checkpoint, slot="classes", only=CLASSIFIERS, outcome="works")
def classes_without_names(checkpoint: Checkpoint) -> None:
    _classes(checkpoint, [f"LABEL_{index}" for index in range(4)])


@oddity(Checkpoint, slot="classes", only=CLASSIFIERS)
def classes_of_one_name(checkpoint: Checkpoint) -> None:
    checkpoint.entries["id2label"] = dict.fromkeys(range(4), "same")


@oddity(Checkpoint, slot="classes", only=CLASSIFIERS)
def classes_called_by_numbers(checkpoint: Checkpoint) -> None:
    _classes(checkpoint, ["3", "1", "0", "2"])


@oddity(Checkpoint, slot="classes", only=CLASSIFIERS)
def classes_of_odd_names(checkpoint: Checkpoint) -> None:
    _classes(checkpoint, ["", "[red]", "a/b", "ça <b>🙂</b>\n"])


@oddity(Checkpoint, slot="classes", only=CLASSIFIERS, outcome="works")
def many_classes(checkpoint: Checkpoint) -> None:
    _classes(checkpoint, [f"class {index}" for index in range(1500)])


@oddity(Checkpoint, slot="classes", only=CLASSIFIERS)
def classes_missing(checkpoint: Checkpoint) -> None:
    checkpoint.said |= {"id2label": None, "label2id": None}


@oddity(Checkpoint, slot="problem", only=CLASSIFIERS, outcome="works")
def single_label_by_name(checkpoint: Checkpoint) -> None:
    checkpoint.said["problem_type"] = "single_label_classification"


@oddity(Checkpoint, slot="problem", only=CLASSIFIERS)
def multi_label(checkpoint: Checkpoint) -> None:
    checkpoint.said["problem_type"] = "multi_label_classification"


@oddity(Checkpoint, slot="problem", only=CLASSIFIERS)
def regression_of_several(checkpoint: Checkpoint) -> None:
    checkpoint.said["problem_type"] = "regression"


@oddity(Checkpoint, slot="problem", only=CLASSIFIERS)
def unknown_problem(checkpoint: Checkpoint) -> None:
    checkpoint.said["problem_type"] = "ranking"


@oddity(Checkpoint, slot="chunks", only=TEXT)
def chunks_of_one(checkpoint: Checkpoint) -> None:
    checkpoint.said["chunk_size_feed_forward"] = 1


@oddity(Checkpoint, slot="chunks", only=TEXT)
def chunks_of_eight(checkpoint: Checkpoint) -> None:
    checkpoint.said["chunk_size_feed_forward"] = 8


@oddity(Checkpoint, slot="decoder", only=TEXT)
def decoder(checkpoint: Checkpoint) -> None:
    checkpoint.said["is_decoder"] = True


@oddity(Checkpoint, slot="decoder", only=TEXT)
def cross_attention(checkpoint: Checkpoint) -> None:
    checkpoint.said |= {"is_decoder": True, "add_cross_attention": True}


@oddity(Checkpoint, slot="outputs", outcome="works")
def gives_attentions(checkpoint: Checkpoint) -> None:
    checkpoint.said["output_attentions"] = True


@oddity(Checkpoint, slot="outputs")
def gives_attentions_by_sdpa(checkpoint: Checkpoint) -> None:
    checkpoint.said |= {"output_attentions": True, "_attn_implementation": "sdpa", "attn_implementation": "sdpa"}


@oddity(Checkpoint, slot="outputs", outcome="works")
def gives_hidden_states(checkpoint: Checkpoint) -> None:
    checkpoint.said["output_hidden_states"] = True


@oddity(Checkpoint, slot="outputs", outcome="works")
def gives_tuples(checkpoint: Checkpoint) -> None:
    checkpoint.said["return_dict"] = False


@oddity(Checkpoint, slot="outputs", outcome="works")
def torchscript(checkpoint: Checkpoint) -> None:
    checkpoint.said["torchscript"] = True


@oddity(Checkpoint, slot="attention")
def attention_saved_eager(checkpoint: Checkpoint) -> None:
    checkpoint.said["attn_implementation"] = "eager"


@oddity(Checkpoint, slot="attention")
def attention_saved_flash(checkpoint: Checkpoint) -> None:
    checkpoint.said |= {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}


@oddity(Checkpoint, slot="tied", only=("MaskedLM",))
def untied(checkpoint: Checkpoint) -> None:
    checkpoint.entries["tie_word_embeddings"] = False


@oddity(Checkpoint, only=TEXT)
def relative_positions(checkpoint: Checkpoint) -> None:
    checkpoint.said["position_embedding_type"] = "relative_key"


@oddity(Checkpoint, outcome="works")
def checkpointing_left_on(checkpoint: Checkpoint) -> None:
    checkpoint.said["gradient_checkpointing"] = True


@oddity(Checkpoint, slot="architectures")
def architectures_missing(checkpoint: Checkpoint) -> None:
    checkpoint.said["architectures"] = None


@oddity(Checkpoint, slot="architectures")
def two_architectures(checkpoint: Checkpoint) -> None:
    checkpoint.said["architectures"] = [checkpoint.architecture, "GPT2LMHeadModel"]


@oddity(Checkpoint, slot="architectures")
def architecture_unknown(checkpoint: Checkpoint) -> None:
    checkpoint.said["architectures"] = ["MyModelForSomething"]


@oddity(Checkpoint, outcome="works")
def old_version(checkpoint: Checkpoint) -> None:
    checkpoint.said |= {"transformers_version": "4.2.0", "torch_dtype": "float32", "dtype": None}


@oddity(Checkpoint, outcome="works")
def unknown_entries(checkpoint: Checkpoint) -> None:
    checkpoint.said |= {"my_entry": {"a": [1, None]}, "wandb_run": "https://example.org/x", "_name_or_path": "/tmp/x"}


@oddity(Checkpoint, slot="encoding of the config")
def config_with_a_byte_order_mark(checkpoint: Checkpoint) -> None:
    def change(directory: Any) -> None:
        file = directory / "config.json"
        file.write_text(file.read_text(), encoding="utf-8-sig")

    checkpoint.files.append(change)


@oddity(Checkpoint, slot="encoding of the config")
def config_in_utf16(checkpoint: Checkpoint) -> None:
    def change(directory: Any) -> None:
        file = directory / "config.json"
        file.write_text(file.read_text(), encoding="utf-16")

    checkpoint.files.append(change)


@oddity(Checkpoint, slot="quantized", outcome="refused")
def says_it_is_quantized(checkpoint: Checkpoint) -> None:
    checkpoint.said["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@oddity(Checkpoint, outcome="refused")
def brings_code(checkpoint: Checkpoint) -> None:
    checkpoint.said["auto_map"] = {"AutoModel": "modeling_mine.MyModel"}
