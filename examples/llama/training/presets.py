"""Settings of known runs, for --preset."""

from typing import Any

# The paper's runs, as far as it tells their settings.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b-metamathqa": {
        "alpha": 0.15,
        "learning_rate": 2e-5,
        "epochs": 2.0,
        "batch_size": 128,
        "max_length": 1024,
        "dtype": "bfloat16",
        "remat": "dots",
    },
    # One task of TRACE; the others have 3, 7, 5, 3, 5, 5 and 7 epochs.
    "tinyllama-trace": {
        "alpha": 0.05,
        "learning_rate": 1e-5,
        "epochs": 5.0,
        "batch_size": 128,
        "max_length": 1024,
        "dtype": "bfloat16",
        "remat": "dots",
    },
    # Not in the paper: its recipe, on the smallest Llama 3.
    "llama3.2-1b-gsm8k": {
        "alpha": 0.15,
        "learning_rate": 2e-5,
        "epochs": 3.0,
        "batch_size": 128,
        "max_length": 512,
        "dtype": "bfloat16",
        "remat": "dots",
    },
}
