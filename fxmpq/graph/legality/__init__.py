"""What a legal graph is at each stage: lists of small rules, each a predicate with its words."""
