"""The model of a run: module, parameters, tokenizer and image preprocessing as one object."""
