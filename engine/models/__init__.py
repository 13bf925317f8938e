"""Model definitions over the op table, one file for each `model_type`."""
