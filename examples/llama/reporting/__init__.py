"""What a person looks at: plots, reports and tables."""
