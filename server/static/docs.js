// swagger-ui over our own document; a key that the chat page was given in this tab is used here too.
const ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  tryItOutEnabled: true,
  displayRequestDuration: true,
  validatorUrl: null,
  onComplete() {
    const key = sessionStorage.getItem("mixbit.key");
    if (key) ui.preauthorizeApiKey("key", key);
  },
});
