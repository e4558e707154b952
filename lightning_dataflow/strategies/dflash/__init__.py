"""DFlash (arXiv 2602.06036), with D-PACE (arXiv 2605.18810) as an option."""
