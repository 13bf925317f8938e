// Not a module: it runs before the page is drawn, so that no other colours flash up.
const theme = localStorage.getItem("mixbit.theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
