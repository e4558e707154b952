"""What drafts of whole blocks share."""
