"""What a finished run leaves for its reader: report, model card and zero-shot score."""
