"""Out of the house: model cards, chat, and a merged model that other programs serve."""
