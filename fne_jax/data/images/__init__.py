"""From JPEG bytes to the pixels that the encoder takes: decoding, resizing, augmentation."""
