/** Says how a service that has no models gets one. */
export function NoModels() {
  return (
    <p class="note">
      The service has no models. <code>raydpo up --model NAME=SOURCE</code> adds one: a name of your choice, and a folder or
      an id on the Hugging Face hub, such as <code>qwen=Qwen/Qwen3-0.6B</code>.
    </p>
  );
}
