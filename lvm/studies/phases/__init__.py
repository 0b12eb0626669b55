"""The phase table trained anew, beside its published figures."""
