"""`python -m sevpeft` and `accelerate launch -m sevpeft`: the same verbs as the `sevpeft` command."""

from sevpeft.cli import main

main()
