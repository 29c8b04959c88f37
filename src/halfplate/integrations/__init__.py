"""The classes that other libraries call. This package may import everything else, and nothing else imports it."""
