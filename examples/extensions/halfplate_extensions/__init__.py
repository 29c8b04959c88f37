"""Extensions of Halfplate that live outside it; docs/extending.md walks through them."""
