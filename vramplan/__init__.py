"""vramplan: will this fine-tuning job fit this card?"""

__version__ = "0.1.0"
