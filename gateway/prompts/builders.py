"""The prompt builders of a gateway: one for each model whose tokenizer it has been told of."""

from __future__ import annotations

from gateway.config import Settings
from gateway.prompts.builder import PromptBuilder


class PromptBuilders:
    """By model. One that no setting names has its prompts sent as text, without a template."""

    def __init__(self, settings: Settings) -> None:
        self._default_model = settings.alias_map.get(settings.default_model, settings.default_model)
        self.main = PromptBuilder(settings)
        self._of_model = {
            model: PromptBuilder(settings.model_copy(update={"tokenizer": folder}))
            for model, folder in settings.tokenizer_map.items()
        }
        style = "raw" if settings.prompt_style == "chat" else settings.prompt_style
        without = settings.model_copy(update={"tokenizer": None, "prompt_style": style})
        self._without_tokenizer = PromptBuilder(without)

    def take(self, other: PromptBuilders) -> None:
        """Those of other settings, for whoever asks from now on."""
        self._default_model, self.main = other._default_model, other.main
        self._of_model, self._without_tokenizer = other._of_model, other._without_tokenizer

    def find(self, model: str) -> PromptBuilder:
        """GATEWAY_TOKENIZER is the default model's; without one, of all that have none."""
        if model in self._of_model:
            return self._of_model[model]
        is_main = self._default_model in {"", model}
        return self.main if is_main else self._without_tokenizer
