"""A checkpoint's files on disk: which there are, what they say, whether they are whole."""
