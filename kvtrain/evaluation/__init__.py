"""What was lost and what was saved: perplexity through the serving cache, reports of runs."""
