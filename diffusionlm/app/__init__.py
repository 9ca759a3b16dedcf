"""The browser app: a page on which a loaded checkpoint completes, answers and fills gaps in view of the user."""
