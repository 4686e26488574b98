"""All knowledge of Transformers: configuration, quantizer, checkpoint checks, saving and named model shapes."""
