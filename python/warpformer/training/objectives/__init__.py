"""What models are trained to do: a file for each objective."""
