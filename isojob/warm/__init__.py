"""What runs inside a template and its forks: data of `isojob._template`, never imported."""
