"""Sharing: model cards, chat, and a merged model that other programs serve."""
