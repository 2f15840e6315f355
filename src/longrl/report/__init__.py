"""What a run reports: metrics while it runs, a page when it is done."""
