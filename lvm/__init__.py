"""Latent vector models: predict the next text embedding from a long context of them."""
