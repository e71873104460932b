"""Names that several stages know: of files, and how a folder is told from a Hub id."""

from pathlib import Path

REPORT_FILE = "hfq.json"
CARD_FILE = "README.md"
TRIALS_FILE = "trials.jsonl"
RECOVERY_FILE = "recovery.safetensors"  # in a run's work folder: what an interrupted training goes on from
EXPORT = "export"  # the finished export in a run's work folder
PLOTS = "plots"  # the folder of a card's plots
PLOT_FILES = (f"{PLOTS}/accuracy_speed.png", f"{PLOTS}/layer_sensitivity.png")
INPUT_RANGES = "hfq_input_ranges"  # in `quantization_config`: a layer's name to its input scale and int8 zero point


def is_path(reference: str) -> bool:
    """Whether a checkpoint or dataset is a folder or file here rather than a Hub id."""
    try:
        return reference.startswith((".", "/", "~")) or Path(reference).exists()
    except (OSError, ValueError):  # no name that a file can have
        return False
