"""Records and texts as tokens: formats, templates, tokenizers, rows."""
