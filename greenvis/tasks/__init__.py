"""What an answer is, and how answers are judged."""
