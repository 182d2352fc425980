"""By what a config.json says that a checkpoint is compressed, and in which version of the format."""

QUANT_METHOD = "vitshrink"
FORMAT_VERSION = 1
