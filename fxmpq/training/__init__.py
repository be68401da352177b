"""Training: a calibrated graph whose weights and steps learn, and the loop that trains it."""
