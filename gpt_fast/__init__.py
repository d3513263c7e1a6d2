"""gpt-fast for TorchServe: a small PyTorch-native engine for Llama-family models, and its server package."""
