"""What an evaluation is shown as: tables, contact sheets, the page, pictures for W&B."""
