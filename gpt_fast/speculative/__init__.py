"""Speculative decoding: who proposes, how proposals are verified, and when they pay."""
