"""Five families of tasks. A task is data: where its records lie, what is asked of each, and what is measured."""
