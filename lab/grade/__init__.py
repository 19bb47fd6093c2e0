"""The course's judge at home: asks, scores, says what is wrong."""
